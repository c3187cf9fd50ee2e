"""check_grpcio.py SERVER: a foreign gRPC implementation (grpcio) against rpc-probe-server: every kind of method, health, reflection.

Exit 77 (skip) without grpcio or protobuf. Messages are built from what reflection returns, so nothing here is generated from our files.
"""
import subprocess
import sys
import threading

try:
    import grpc
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except ImportError as missing:
    print(f"skipped: {missing}; install python3-grpcio and python3-protobuf")
    sys.exit(77)

PATIENCE_S = 10


def varint(n):
    out = b""
    while True:
        out += bytes([n & 0x7F | (0x80 if n > 0x7F else 0)])
        n >>= 7
        if not n:
            return out


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def fields(data):
    """(number, value) of each field; value is int or bytes."""
    at = 0

    def read():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = read()
        if key & 7 == 0:
            yield key >> 3, read()
        else:
            assert key & 7 == 2
            size = read()
            yield key >> 3, data[at : at + size]
            at += size


def reflect(channel, version, requests):
    call = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
    return [dict(fields(answer)) for answer in call(iter(requests), timeout=PATIENCE_S)]


def check_reflection(channel):
    pool = descriptor_pool.DescriptorPool()
    for version in ("v1", "v1alpha"):
        listed, files, absent, by_name = reflect(
            channel,
            version,
            [field(7, b""), field(4, b"weft.test.Probe"), field(4, b"no.such.Symbol"), field(3, b"grpc/health.proto")],
        )
        names = [dict(fields(service))[1].decode() for number, service in fields(listed[6])]
        assert names == [
            "grpc.health.v1.Health",
            "weft.test.Probe",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        ], names
        assert dict(fields(absent[7]))[1] == grpc.StatusCode.NOT_FOUND.value[0]
        health = descriptor_pb2.FileDescriptorProto.FromString(dict(fields(by_name[4]))[1])
        assert health.package == "grpc.health.v1"
        if version == "v1":
            for _, serialized in fields(files[4]):
                pool.AddSerializedFile(serialized)
    return message_factory.MessageFactory(pool).GetPrototype(pool.FindMessageTypeByName("weft.test.Number"))


def check_methods(channel, Number):
    codec = dict(request_serializer=Number.SerializeToString, response_deserializer=Number.FromString)
    path = "/weft.test.Probe/"
    assert channel.unary_unary(path + "Add", **codec)(Number(value=41), timeout=PATIENCE_S).value == 42
    counted = channel.unary_stream(path + "Count", **codec)(Number(value=100), timeout=PATIENCE_S)
    assert [n.value for n in counted] == list(range(100))
    numbers = [Number(value=i) for i in range(101)]
    assert channel.stream_unary(path + "Sum", **codec)(iter(numbers), timeout=PATIENCE_S).value == 5050
    echoed = channel.stream_stream(path + "Echo", **codec)(iter(numbers), timeout=PATIENCE_S)
    assert [n.value for n in echoed] == list(range(101))
    compressed = channel.unary_unary(path + "Add", **codec)(
        Number(value=1, payload=b"x" * 100000), timeout=PATIENCE_S, compression=grpc.Compression.Gzip
    )
    assert compressed.payload == b"x" * 100000
    for method, status in (("Fail", grpc.StatusCode.PERMISSION_DENIED), ("Absent", grpc.StatusCode.UNIMPLEMENTED)):
        try:
            channel.unary_unary(path + method, **codec)(Number(value=103), timeout=PATIENCE_S)
            raise AssertionError(f"{method} answered")
        except grpc.RpcError as error:
            assert error.code() == status, error
    try:
        channel.unary_unary(path + "Add")(b"\xff\xff", timeout=PATIENCE_S)
        raise AssertionError("bytes that are no message were taken")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error


def check_health(channel):
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"", timeout=PATIENCE_S) == b"\x08\x01"
    assert check(field(1, b"weft.test.Probe"), timeout=PATIENCE_S) == b"\x08\x01"
    try:
        check(field(1, b"no.such.Service"), timeout=PATIENCE_S)
        raise AssertionError("an unknown service has a health")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND, error
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
    unknown = watch(field(1, b"no.such.Service"), timeout=PATIENCE_S)
    assert next(unknown) == b"\x08\x03"
    unknown.cancel()
    return watch(b"", timeout=PATIENCE_S)


def main():
    server = subprocess.Popen([sys.argv[1], "127.0.0.1:0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    timer = threading.Timer(60, server.kill)
    timer.start()
    try:
        channel = grpc.insecure_channel(server.stdout.readline().decode().strip())
        check_methods(channel, check_reflection(channel))
        watch = check_health(channel)
        assert next(watch) == b"\x08\x01"
        server.stdin.close()  # the server shuts down and says so first
        assert next(watch) == b"\x08\x02"
        try:
            next(watch)
            raise AssertionError("the watch outlived its server")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error
        assert server.wait(PATIENCE_S) == 0
    finally:
        server.kill()
        timer.cancel()
    print("grpcio: unary, three kinds of streams, gzip, errors, health, reflection v1 and v1alpha")


main()
