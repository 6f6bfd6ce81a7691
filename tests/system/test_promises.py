"""docs/promises.md lists the tests that exist."""

import pytest
import torch
from promises import PAGE, PROMISES, ROOT, belongs, page


@pytest.mark.skipif(torch.cuda.is_available(), reason="the table counts the cases of a machine without a GPU")
def test_the_page_shows_what_the_suite_holds(request, all_cases):
    """Run ``python tests/promises.py`` if this fails."""
    files = {name.split("::")[0] for name in all_cases}
    missing = {f"tests/{test.split('::')[0]}" for promise in PROMISES for test in promise.tests} - files
    if missing or any("::" in argument for argument in request.config.args):
        pytest.skip("only a part of the suite was asked for: its cases cannot be counted")
    on_a_gpu = [name for name, gpu in all_cases.items() if gpu]
    assert PAGE.read_text(encoding="utf-8") == page(all_cases, on_a_gpu)


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
