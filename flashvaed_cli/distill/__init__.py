"""Three-phase distillation: phases, losses and one training loop."""
