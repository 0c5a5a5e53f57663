"""Where a model holds its facts: causal traces, states that edits move, and layers to edit."""
