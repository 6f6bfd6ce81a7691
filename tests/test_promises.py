"""The README's table of promises is that of the tests that there are."""

import pytest
import torch
from promises import PROMISES, README, ROOT, belongs, table, with_table


@pytest.mark.skipif(torch.cuda.is_available(), reason="the table counts the cases of a machine without a GPU")
def test_the_readme_shows_what_the_suite_holds(request):
    """Run ``python tests/promises.py`` where this fails."""
    items = request.session.items
    files = {item.nodeid.split("::")[0] for item in items}
    missing = {f"tests/{test.split('::')[0]}" for promise in PROMISES for test in promise.tests} - files
    if missing or any("::" in argument for argument in request.config.args) or request.config.option.keyword:
        pytest.skip("a part of the suite alone was asked for: its cases cannot be counted")
    gpu = [item.nodeid for item in items if item.get_closest_marker("gpu")]
    readme = README.read_text(encoding="utf-8")
    assert readme == with_table(readme, table([item.nodeid for item in items], gpu))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.text)
def test_what_keeps_a_promise_exists(promise):
    for test in promise.tests:
        file, _, function = test.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text


def test_cases_belong_to_a_file_or_a_function():
    assert belongs("tests/test_a.py::test_b[c::d]", "test_a.py")
    assert belongs("tests/test_a.py::Group::test_b", "test_a.py")
    assert belongs("tests/test_a.py::test_b[c]", "test_a.py::test_b")
    assert not belongs("tests/test_a.py::test_bc", "test_a.py::test_b")
    assert not belongs("tests/test_ab.py::test_b", "test_a.py")
