"""Changes of the routing table's structure reach some workers first, and the others when those live on."""
