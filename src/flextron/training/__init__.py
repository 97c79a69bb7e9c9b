"""Training: distillation, routers, and the stages that make a model elastic."""
