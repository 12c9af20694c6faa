"""Data: annotations, audio decoding, shard records and the workers that build shards."""
