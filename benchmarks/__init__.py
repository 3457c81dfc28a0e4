"""Measurements that the README and docs quote; each script prints the table it is quoted for."""
