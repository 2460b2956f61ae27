#!/usr/bin/env python3
"""Refreshes descriptors/*.binpb, the input of build.rs. Not needed for a build.

    pip install grpcio-tools
    python3 refresh.py [envoy]        # needs Go for "envoy"

envoy.binpb  Envoy v3, xds, udpa, cel, googleapis and OpenTelemetry (Apache-2.0): the FileDescriptorProtos that the
             generated Go modules below register, as of the Envoy version that the proxy is measured against.
istio.binpb  our own istio/**/*.proto, compiled by the protoc inside PyPI `grpcio-tools`.
"""
import pathlib
import subprocess
import sys
import tempfile

import google.protobuf.descriptor_pb2 as d
import grpc_tools
from grpc_tools import protoc

HERE = pathlib.Path(__file__).resolve().parent
MODULES = {
    "github.com/envoyproxy/go-control-plane/envoy": "v1.40.0",
    "github.com/cncf/xds/go": "v0.0.0-20260202195803-dba9d589def2",
    "cel.dev/expr": "v0.25.2",
    "go.opentelemetry.io/proto/otlp": "v1.11.1",
    "google.golang.org/genproto/googleapis/api": "v0.0.0-20260928230214-8a89bd6388cc",
    "google.golang.org/genproto/googleapis/rpc": "v0.0.0-20260928230214-8a89bd6388cc",
}
# Packages of the v2 API register the same extensions as others do, or are never asked for.
NO_PACKAGE = ("/v2/", "/v2alpha/", "/v2alpha1/", "conformance", "/envoy/api/")
MAIN = """package main

import (
	"os"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
%s)

func main() {
	set := &descriptorpb.FileDescriptorSet{}
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		set.File = append(set.File, protodesc.ToFileDescriptorProto(f))
		return true
	})
	b, err := proto.Marshal(set)
	if err != nil {
		panic(err)
	}
	os.Stdout.Write(b)
}
"""
# Every message below these is generated; other files only where one of them imports it.
ROOTS = ("envoy/", "xds/", "udpa/", "cel/", "google/rpc/", "google/api/expr/v1alpha1/", "opentelemetry/")
# The v2 API and Envoy's own test and build-time messages are not part of what a proxy is asked to serve.
DROP = ("envoy/api/v2", "/v2/", "/v2alpha/", "/v1/", "/v2alpha1/", "/v1alpha1/")
KEEP_V1 = ("opentelemetry/", "google/", "cel/", "xds/", "udpa/")


def go_files():
    with tempfile.TemporaryDirectory() as work:
        def go(*args):
            return subprocess.run(["go", *args], cwd=work, check=True, stdout=subprocess.PIPE).stdout

        go("mod", "init", "descriptors")
        go("get", *(f"{module}@{version}" for module, version in MODULES.items()))
        listed = go("list", "-e", "-f", "{{if .GoFiles}}{{.ImportPath}}{{end}}", *(f"{m}/..." for m in MODULES))
        packages = [p for p in listed.decode().split() if not any(part in f"{p}/" for part in NO_PACKAGE)]
        (pathlib.Path(work) / "main.go").write_text(MAIN % "".join(f'\t_ "{p}"\n' for p in packages))
        go("mod", "tidy")
        s = d.FileDescriptorSet()
        s.ParseFromString(go("run", "."))
        return {f.name: f for f in s.file}


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
    if "envoy" in sys.argv[1:]:
        files = go_files()
        write(HERE / "descriptors/envoy.binpb", ordered(files, [n for n in files if wanted(n)]))
    own = sorted(str(p.relative_to(HERE / "istio")) for p in (HERE / "istio").rglob("*.proto"))
    if own:
        files = compile_set(HERE / "istio", own)
        write(HERE / "descriptors/istio.binpb", [f for f in files.values() if f.name in own])


if __name__ == "__main__":
    main()
