"""Mixture-of-experts routing."""

from pallas_kernels.router.api import Routing, router

__all__ = ["Routing", "router"]
