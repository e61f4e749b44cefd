#!/usr/bin/env bash
# Flower 1.42.0: a node's key that was unregistered at a SuperLink can never be registered there again, also by the same
# account and after a restart of the SuperLink on the same database. Expected was that a node that was taken out can be
# put back with the key that it has.
#
# Why it matters here: an operator who excludes a node, sees that it was a mistake and wants it back would have to send
# its owner a new key. So perfedrec keeps the keys of excluded nodes registered and leaves the nodes out of the rounds
# itself (perfedrec federation nodes --exclude, --undo); only a removed key file ends in an unregistered key.
#
# Seen 2026-11-30: "register" succeeds, "unregister" succeeds, and the second "register" of the same key says that the
# public key is in use. The list of nodes shows it as unregistered.
#
# Exits with 1 if this changes.
set -euo pipefail
folder="$(mktemp -d)"
link=""
trap '[ -z "$link" ] || kill "$link" 2> /dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flwr==1.42.0 cryptography==50.0.0
export PATH="$folder/venv/bin:$PATH" FLWR_HOME="$folder/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
mkdir "$FLWR_HOME"
port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
printf '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:%s"\nroot-certificates = "%s"\n' "$port" \
    "$folder/server.pem" > "$FLWR_HOME/config.toml"
python - "$folder" << 'PYTHON'
import datetime
import ipaddress
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

folder, pem = sys.argv[1], serialization.Encoding.PEM
node, server = (ec.generate_private_key(curve) for curve in (ec.SECP384R1(), ec.SECP256R1()))
form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
open(f"{folder}/node.pub", "wb").write(node.public_key().public_bytes(*form))
form = pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
open(f"{folder}/server.key", "wb").write(server.private_bytes(*form))
name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "here")]), datetime.datetime.now(datetime.timezone.utc)
made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(server.public_key())
made = made.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
open(f"{folder}/server.pem", "wb").write(made.sign(server, hashes.SHA256()).public_bytes(pem))
PYTHON
start() {
    flower-superlink --ssl-ca-certfile "$folder/server.pem" --ssl-certfile "$folder/server.pem" \
        --ssl-keyfile "$folder/server.key" --enable-supernode-auth --disable-runtime-dependency-installation \
        --host 127.0.0.1 --port "$port" --database "$folder/state.db" > "$folder/log" 2>&1 &
    link=$!
    for _ in $(seq 120); do
        flwr supernode list here > /dev/null 2>&1 && return 0
        kill -0 "$link" 2> /dev/null || { cat "$folder/log"; exit 2; }
        sleep 0.5
    done
    cat "$folder/log"; exit 2
}
start
flwr supernode register "$folder/node.pub" here > "$folder/first"
number="$(flwr supernode list here --format json | python -c 'import json, sys; print(json.load(sys.stdin)["nodes"][0]["node-id"])')"
flwr supernode unregister "$number" here > "$folder/out"
again() { flwr supernode register "$folder/node.pub" here > "$folder/again" 2>&1 && echo "registered" || echo "refused"; }
at_once="$(again)"
kill "$link"; wait "$link" || true
start
later="$(again)"
tr -s ' \n│╭╮╰╯─' ' ' < "$folder/again"; echo
echo "flwr $(flwr --version | tr -dc '0-9.'): the key is $at_once at once, and $later after a restart"
[ "$at_once $later" = "refused refused" ]
