"""The stages of a distillation. Each holds a core (plain torch) beside its Ray callable."""
