"""Sample-Routed Policy Optimization (arXiv 2604.02288) on megatron-core."""

__version__ = "0.1.0"
