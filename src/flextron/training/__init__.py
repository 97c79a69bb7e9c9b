"""Training: data, distillation and the stages that make a model elastic."""
