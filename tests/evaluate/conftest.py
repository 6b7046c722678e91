"""What several tests of evaluation look at."""

import pytest

from attnconv.distill.embedded import embedded_model_path
from attnconv.evaluate.diagnostics import Diagnosis, diagnose_model


@pytest.fixture(scope="session")
def diagnosis() -> Diagnosis:
    return diagnose_model(str(embedded_model_path()), text="book", tokens=256, context=128, window=16)
