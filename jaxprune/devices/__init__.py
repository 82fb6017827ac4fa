"""Devices: meshes, memory, compilations. Nothing here knows a model."""
