"""Attention of every kind: a layer selects which entries a query sees, one sparse op attends to them."""

from dsv4.model.attention.attention import Attention, AttentionTrace

__all__ = ["Attention", "AttentionTrace"]
