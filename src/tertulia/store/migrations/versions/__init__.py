"""One file a version, in their order. A version that was released is never edited."""
