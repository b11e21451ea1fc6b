"""The mathematics of the papers: pure functions on small arrays.

Nothing here knows of processes, devices or shards.
"""

from typing import Annotated

from pydantic import Field

from megatron_srpo.algorithm.advantage_mix import AdvantageMix
from megatron_srpo.algorithm.grpo import GRPO
from megatron_srpo.algorithm.sdpo import SDPO
from megatron_srpo.algorithm.srpo import SRPO

AnyAlgorithm = Annotated[SRPO | GRPO | SDPO | AdvantageMix, Field(discriminator="name")]
