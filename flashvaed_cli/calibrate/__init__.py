"""Run clips through decoders and accumulate statistics."""
