"""The base of every process: process groups, Megatron behind the CPU shim, heartbeat, files."""
