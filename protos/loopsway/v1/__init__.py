"""Loopsway's gRPC API, version 1: the messages, the service's stubs, and tensors to and from numpy.

`attribution_pb2` and `attribution_pb2_grpc` are made by `protos/generate.sh` from `attribution.proto`, which documents
every field; `tensors` is written by hand. Nothing is imported here, so that importing a part costs only that part.
"""
