"""The table of data sources, and the functions in it."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from pipeline.config.data import SOURCE_CONFIGS, FileDataConfig
from pipeline.data.sources import SOURCES, USER_FUNCTION


def test_every_configured_source_is_in_the_table() -> None:
    assert set(SOURCES) == {*SOURCE_CONFIGS, USER_FUNCTION}


@pytest.mark.parametrize("name", SOURCES)
def test_functions_of_a_source_exist_and_take_the_arguments(name: str) -> None:
    def parameters(path: str) -> list[str]:
        module, _, function = path.partition(":")
        return list(inspect.signature(getattr(import_module(f"pipeline.data.sources.{module}"), function)).parameters)

    functions = SOURCES[name]
    assert parameters(functions.open) == ["job", "on_progress", "float64"]
    if functions.fingerprint:
        assert parameters(functions.fingerprint) == ["job", "on_progress"]
    has_url = name in SOURCE_CONFIGS and issubclass(SOURCE_CONFIGS[name], FileDataConfig)
    assert bool(functions.check_url) == has_url
    if functions.check_url:
        assert parameters(functions.check_url) == ["url"]
