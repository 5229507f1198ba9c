"""The look of the code: widths, lambdas, and imports that run one way (downwards)."""
import ast

from conftest import ROOT

# each file and all of ours that it may import, outside of functions
ARROWS = dict(
    flow="", model="", common="model", sample="common flow", data="common flow",
    videos="common flow", metrics="data flow", train="common data flow sample",
    probe="common data flow metrics model sample train videos")


def test_no_line_is_wider_than_100_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert len(line) <= 100, f"{path.name}:{number}"


def test_few_lambdas_and_imports_that_run_downwards():
    lambdas = 0
    assert {path.stem for path in ROOT.glob("*.py")} == set(ARROWS)
    for name, allowed in ARROWS.items():
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        lambdas += sum(isinstance(node, ast.Lambda) for node in ast.walk(tree))
        for node in tree.body:
            imported = [getattr(node, "module", None)]
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert set(imported) & set(ARROWS) <= set(allowed.split()), name
    assert lambdas <= 8
