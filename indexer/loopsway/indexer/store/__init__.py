"""What lies on disk or in a bucket: files, the parts of an index and their arrays, the manifest, the lock."""
