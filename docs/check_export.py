#!/usr/bin/env python3
"""Checks an exported audit log by itself: python3 check_export.py EXPORT JWKS [CHECKPOINT]
Exits 0 if all holds, 1 if not, 2 if a JWT is signed by ES256, which the standard library can't verify. It is for all of a log, no part."""
import base64, hashlib, json, re, sys
ORDER = "eventId seq agentId actorId action outcome ipAddress userAgent metadata timestamp prevHash hash".split()
HASHED = "prevHash seq eventId timestamp agentId actorId action outcome ipAddress userAgent metadata".split()
FORM = {**dict.fromkeys(ORDER, r'"[^"\\]*(?:\\.[^"\\]*)*"'), **dict.fromkeys(("agentId", "actorId"), '"[0-9a-f-]{36}"|null'),
        "seq": "[1-9][0-9]{0,18}", "metadata": ".+"}
EVENT = re.compile((r"\{" + ",".join(f'"{name}":(?P<{name}>{FORM[name]})' for name in ORDER) + r"\}\n").encode())
number, line, first, now, found = 0, b"", None, (0, "0" * 64), set()

def want(holds, why, status=1):
    if not holds:
        print(f"line {number}: {why}" if number else why, file=sys.stderr)
        sys.exit(status)

def verified(jwt):
    parts = [base64.urlsafe_b64decode(part + "==") for part in jwt.split(".")]  # skips what is not base64
    want(jwt == ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts), "not base64url")
    head, claims, signature = json.loads(parts[0]), json.loads(parts[1]), parts[2]
    key = keys.get(head["kid"])
    want(key and (head["typ"], head["alg"]) == ("audit-checkpoint+jwt", key["alg"]), "wrong typ, kid or alg in the JWT")
    want(key["alg"] != "ES256", "the JWT is signed by ES256, which this checker can't verify", 2)
    n, e = (int.from_bytes(base64.urlsafe_b64decode(key[name] + "=="), "big") for name in "ne")
    s, size = int.from_bytes(signature, "big"), (n.bit_length() + 7) // 8
    info = bytes.fromhex("003031300d060960864801650304020105000420")  # SHA-256, of RFC 8017 section 9.2
    block = b"\0\1" + (info + hashlib.sha256(jwt.rpartition(".")[0].encode()).digest()).rjust(size - 2, b"\xff")
    want(len(signature) == size >= 256 and s < n and pow(s, e, n).to_bytes(size, "big") == block, "bad signature")
    want("part" not in claims or number == 0, "this is a part of a log, which this checker doesn't know", 2)
    return claims["iss"], (claims["seq"], claims["hash"])

try:
    want(len(sys.argv) in (3, 4), __doc__.splitlines()[0])
    keys = {key["kid"]: key for key in json.load(open(sys.argv[2], "rb"))["keys"] if "kid" in key}
    kept, file = [verified(jwt) for jwt in sys.argv[3:]], open(sys.argv[1], "rb")
    for number, line in enumerate(iter(lambda: file.readline(1 << 20), b""), 1):  # so no line fills the memory
        if not (event := EVENT.fullmatch(line)): break
        value = {name: json.loads(event[name].decode()) for name in ORDER}
        served = (event[name] if name == "metadata" else str(value[name] or "").encode() for name in HASHED)
        want(hashlib.sha256(b"".join(b"%d:%s," % (len(s), s) for s in served)).hexdigest() == value["hash"], "bad hash")
        before, last, now = (value["seq"] - 1, value["prevHash"]), now, (value["seq"], value["hash"])
        want(before == last or number == 1 and before[0], "seq or prevHash does not follow on the line before, which in a part of a log it needn't")
        first, found = first or now[0], found.union(one for one in kept if one[1] in (before, now))
    jwt = re.fullmatch(rb'\{"checkpoint":"([\w.-]+)"\}\n?', line)
    want(jwt and not file.read(1), "not an event, or the export does not end here with its checkpoint")
    issuer, event = verified(jwt[1].decode())
    want(first and event == now, "the checkpoint is not of the event before it")
    want(all(one in found and one[0] == issuer for one in kept), f"not of this issuer, or not in here: {kept}")
    print(f"checked hashes, order and signature of seq {first} to {now[0]}, issuer {json.dumps(issuer)}", flush=True)
except Exception as error: want(False, f"can't be read, {type(error).__name__}: {error}")
