"""Side-by-side experiments: `bp-torch study NAME`."""

from .core import Study
from .initialization import STUDY as INITIALIZATION
from .learning_rates import STUDY as LEARNING_RATES
from .overfitting import STUDY as OVERFITTING
from .underfitting import STUDY as UNDERFITTING
from .vanishing_gradients import STUDY as VANISHING_GRADIENTS

STUDIES: dict[str, Study] = {
    study.name: study for study in (OVERFITTING, UNDERFITTING, VANISHING_GRADIENTS, LEARNING_RATES, INITIALIZATION)
}
