"""What several commands share: inputs and outputs, clips, originals, records of a run."""
