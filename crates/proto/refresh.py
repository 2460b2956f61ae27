#!/usr/bin/env python3
"""Refreshes descriptors/*.binpb, the input of build.rs. Not needed for a build.

    pip download --no-deps -d /tmp/xds-protos xds-protos==1.85.0
    pip install grpcio-tools
    python3 refresh.py /tmp/xds-protos/xds_protos-1.85.0-py3-none-any.whl

envoy.binpb  Envoy v3, xds, udpa, cel, googleapis and OpenTelemetry: the FileDescriptorProtos that the generated
             modules of PyPI `xds-protos` embed (Apache-2.0), read from the wheel without importing it.
istio.binpb  our own istio/**/*.proto, compiled by the protoc inside PyPI `grpcio-tools`.
"""
import ast
import pathlib
import sys
import tempfile
import zipfile

import google.protobuf.descriptor_pb2 as d
import grpc_tools
from grpc_tools import protoc

HERE = pathlib.Path(__file__).resolve().parent
SOURCES = ("envoy/", "xds/", "udpa/", "cel/", "validate/", "google/", "opentelemetry/", "opencensus/")
# Every message below these is generated; the rest of SOURCES only where one of them imports it.
ROOTS = ("envoy/", "xds/", "udpa/", "cel/", "google/rpc/", "google/api/expr/v1alpha1/", "opentelemetry/")
# The v2 API and Envoy's own test and build-time messages are not part of what a proxy is asked to serve.
DROP = ("envoy/api/v2", "/v2/", "/v2alpha/", "/v1/", "/v2alpha1/", "/v1alpha1/")
KEEP_V1 = ("opentelemetry/", "google/", "cel/", "xds/", "udpa/")


def wheel_files(wheel):
    with zipfile.ZipFile(wheel) as z:
        for name in sorted(z.namelist()):
            if not name.endswith("_pb2.py") or not name.startswith(SOURCES):
                continue
            for node in ast.walk(ast.parse(z.read(name))):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "AddSerializedFile":
                    f = d.FileDescriptorProto()
                    f.ParseFromString(ast.literal_eval(node.args[0]))
                    yield f


def wanted(name):
    return name.startswith(ROOTS) and "/conformance" not in name and (name.startswith(KEEP_V1) or not any(part in name for part in DROP))


def well_known(name):
    include = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    return compile_set(include, [name])[name]


def compile_set(include, names):
    std = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    with tempfile.NamedTemporaryFile() as out:
        args = ["protoc", f"-I{include}", f"-I{std}", "--include_imports", f"--descriptor_set_out={out.name}", *names]
        if protoc.main(args) != 0:
            sys.exit("protoc failed")
        s = d.FileDescriptorSet()
        s.ParseFromString(pathlib.Path(out.name).read_bytes())
    return {f.name: f for f in s.file}


def ordered(files, roots):
    done, out = set(), []

    def visit(name):
        if name in done:
            return
        done.add(name)
        if name not in files and name.startswith("google/protobuf/"):
            files[name] = well_known(name)
        if name not in files:
            sys.exit(f"missing import {name}")
        for dep in files[name].dependency:
            visit(dep)
        out.append(files[name])

    for r in sorted(roots):
        visit(r)
    return out


def write(path, files):
    for f in files:
        f.ClearField("source_code_info")
    s = d.FileDescriptorSet(file=files)
    path.write_bytes(s.SerializeToString(deterministic=True))
    print(f"{path.name}: {len(files)} files, {path.stat().st_size} bytes")


def main():
    (HERE / "descriptors").mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        files = {f.name: f for f in wheel_files(sys.argv[1])}
        write(HERE / "descriptors/envoy.binpb", ordered(files, [n for n in files if wanted(n)]))
    own = sorted(str(p.relative_to(HERE / "istio")) for p in (HERE / "istio").rglob("*.proto"))
    if own:
        files = compile_set(HERE / "istio", own)
        write(HERE / "descriptors/istio.binpb", [f for f in files.values() if f.name in own])


if __name__ == "__main__":
    main()
