"""Options of `pytest bench/`."""


def pytest_addoption(parser):
    group = parser.getgroup("mmkernels")
    group.addoption("--preset", default="quick", help="cases of the registry to run: quick, paper or gpu")
    group.addoption("--bench-op", default=None, help="only this op")
    group.addoption("--bench-case", action="append", default=None, help="only cases whose id matches this pattern")
