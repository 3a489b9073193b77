"""replay runs reference modules on the inputs of another run, and records what they make of them as a run."""
