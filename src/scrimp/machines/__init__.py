"""What a step costs where: descriptions of machines, a probe of this one, and the models of time and memory."""
