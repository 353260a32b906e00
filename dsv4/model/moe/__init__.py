"""Mixture of experts: a router, routed experts, shared experts."""

from dsv4.model.moe.moe import MoE, MoETrace

__all__ = ["MoE", "MoETrace"]
