"""From the gradients of many environments to one, a file for each rule."""
