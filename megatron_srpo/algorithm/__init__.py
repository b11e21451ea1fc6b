"""The mathematics of the papers: pure functions on small arrays, without processes, devices or shards."""

import functools
import operator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from megatron_srpo.algorithm.methods import METHODS
from megatron_srpo.algorithm.settings import Algorithm

if TYPE_CHECKING:
    AnyAlgorithm = Algorithm
else:
    AnyAlgorithm = Annotated[functools.reduce(operator.or_, METHODS.values()), Field(discriminator="name")]
