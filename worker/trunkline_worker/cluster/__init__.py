"""The cluster: controller, embedded cluster, settings and the commands that start and end it."""
