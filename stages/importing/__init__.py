"""Import: labelled images of any common layout to image shards."""
