"""Where things run and live: Ray session, runners, storage, shard formats, progress, fault policy."""
