#!/bin/sh
# Copies this system's Python into a folder, with the libraries and modules that the CNI plugin needs and nothing else:
# what `flannelpy cni install --runtime=FOLDER` puts onto hosts. Needs patchelf and Debian's python3.
set -eu
folder=$1
python=$(readlink -f "$(command -v python3)")
version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
modules=$folder/lib/$version
mkdir -p "$modules/lib-dynload"

cp "$python" "$folder/python3"
cp -L "$(patchelf --print-interpreter "$python")" "$folder/ld.so"
ldd "$python" | awk '$2 == "=>" { print $3 }' | while read -r library; do cp -L "$library" "$folder/lib/"; done

# The plugin's imports, those of what it falls back to, and os.py, by which Python finds the rest.
"$python" -IS -c '
import _json, _signal, _socket, errno, json, os, stat, sys, encodings.ascii, encodings.latin_1
for module in list(sys.modules.values()):
    if getattr(module, "__file__", None):
        print(module.__file__)
' | sort -u | while read -r file; do
    target=$modules/${file#*/"$version"/}
    mkdir -p "$(dirname "$target")"
    cp "$file" "$target"
done
"$python" -m compileall -q --invalidation-mode unchecked-hash "$modules"

# Its libraries lie beside it. Where its loader will be, only the host's folder tells: room for that path.
room=$(printf '/%.0s' $(seq 250))
patchelf --force-rpath --set-rpath "\$ORIGIN/lib" --set-interpreter "${room}ld.so" "$folder/python3"
