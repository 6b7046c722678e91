"""What several tests of evaluation look at."""

import pytest

from attnconv.evaluate.diagnose import Diagnosis, diagnose_model
from attnconv.packaged.model import embedded_model_path


@pytest.fixture(scope="session")
def diagnosis() -> Diagnosis:
    return diagnose_model(str(embedded_model_path()), text="book", tokens=256, context=128, window=16)
