"""The mathematics of the papers: pure functions on small arrays.

Nothing here knows of processes, devices or shards.
"""

from typing import Annotated

from pydantic import Field

from megatron_srpo.algorithm.methods.advantage_mix import AdvantageMix
from megatron_srpo.algorithm.methods.grpo import GRPO
from megatron_srpo.algorithm.methods.sdpo import SDPO
from megatron_srpo.algorithm.methods.srpo import SRPO

AnyAlgorithm = Annotated[SRPO | GRPO | SDPO | AdvantageMix, Field(discriminator="name")]
