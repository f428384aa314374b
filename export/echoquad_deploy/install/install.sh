#!/bin/bash
# shellcheck disable=SC2015  # in 'A && B || die', die does not return
# Install EchoQuad from this stick on a box without a network. See README.txt, or: bash install.sh --help
#
# The whole file is parsed before anything runs: all code is in functions, and the last line calls main and exits.
if [ -z "${BASH_VERSION:-}" ] || shopt -qo posix; then exec bash "$0" "$@"; fi # started as: sh install.sh
set -euo pipefail
umask 022
export LC_ALL=C

readonly SERVICE=echoquad
readonly SERVICE_USER=echoquad
readonly START_TIMEOUT_S=330 # the unit gives the service 300 s
readonly EXIT_HOST=1 EXIT_USAGE=2 EXIT_VERIFICATION=3

usage() {
  cat <<'TEXT'
Usage: bash install.sh [--key PUB.pem | --key-sha256 HEX | --trust-stick | --unsigned] [OPTION]...
       bash install.sh --rollback | --remove [--purge] [OPTION]...

Install EchoQuad from this stick, or upgrade to it. Nothing is fetched from a network.

Whose stick it is:
  --key PUB.pem      The public key that must have signed the stick. Bring it by another way than the stick.
                     An upgrade needs none of these options if the installed key has signed the new stick, too.
  --key-sha256 HEX   SHA-256 of that key instead of the key.
  --trust-stick      Accept the key on the stick. Its SHA-256 is printed: compare it.
  --unsigned         Accept a stick without a signature. The sums then find damage, and no forgery.

Other actions:
  --rollback         Return to the version before. Needs no stick.
  --remove           Stop and remove EchoQuad. Configuration and data stay. Needs no stick.
  --purge            With --remove: remove configuration, data and the user, too.

Options:
  --dry-run          Check everything, change nothing.
  --no-service       Do not call systemd: the unit is written, but neither enabled nor started.
  --python PROGRAM   The Python to use, such as /usr/bin/python3.11.
  --root DIR         Install below DIR instead of /. Implies --no-service. For tests.
  --help             Print this text.

Exit codes: 0 done; 1 this box cannot be used, or the service did not start; 2 usage; 3 the stick or the new version
was refused.
TEXT
}

say() { printf '%s\n' "$*"; }

die() { # CODE MESSAGE
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

# --- options -------------------------------------------------------------------------------------------------------

parse_options() {
  action=install anchor='' key='' key_sha256='' root=/ python='' purge=no dry_run=no use_systemd=yes
  while [ $# -gt 0 ]; do
    case $1 in
      --key | --key-sha256 | --root | --python)
        [ $# -ge 2 ] || die $EXIT_USAGE "$1 needs a value; see --help" ;;
    esac
    case $1 in
      --key) set_anchor key; key=$2; shift ;;
      --key-sha256) set_anchor key_sha256; key_sha256=$2; shift ;;
      --trust-stick) set_anchor stick ;;
      --unsigned) set_anchor none ;;
      --rollback) set_action rollback ;;
      --remove) set_action remove ;;
      --purge) purge=yes ;;
      --dry-run) dry_run=yes ;;
      --no-service) use_systemd=no ;;
      --python) python=$2; shift ;;
      --root) root=$2; shift ;;
      --help | -h) usage; exit 0 ;;
      *) die $EXIT_USAGE "unknown option '$1'; see --help" ;;
    esac
    shift
  done
  [ "$purge" = no ] || [ "$action" = remove ] || die $EXIT_USAGE '--purge needs --remove'
  [ -z "$anchor" ] || [ "$action" = install ] || die $EXIT_USAGE "--$action reads no stick and takes no key"
  root=$(realpath -e -- "$root" 2>/dev/null) && [ -d "$root" ] || die $EXIT_USAGE 'the folder of --root does not exist'
  [ "$root" = / ] || use_systemd=no
  root=${root%/}
  opt=$root/opt/echoquad
  releases=$opt/releases
  etc=$root/etc/echoquad
  state=$root/var/lib/echoquad
  unit=$root/etc/systemd/system/$SERVICE.service
}

set_anchor() {
  [ -z "$anchor" ] || die $EXIT_USAGE 'only one of --key, --key-sha256, --trust-stick and --unsigned can be given'
  anchor=$1
}

set_action() {
  [ "$action" = install ] || die $EXIT_USAGE 'only one of --rollback and --remove can be given'
  action=$1
}

# --- this box ------------------------------------------------------------------------------------------------------

check_host() {
  local tool
  [ "$(id -u)" = 0 ] || [ -n "$root" ] || [ "$dry_run" = yes ] || die $EXIT_HOST 'this needs root; run: sudo bash install.sh ...'
  for tool in openssl sha256sum find xargs flock setpriv df mv realpath; do
    command -v "$tool" >/dev/null || die $EXIT_HOST "the program '$tool' is missing; install it first (Debian: apt install openssl util-linux findutils coreutils)"
  done
  [ -n "$root" ] || [ "$(id -u)" != 0 ] || command -v useradd >/dev/null ||
    die $EXIT_HOST "the program 'useradd' is missing; install it first (Debian: apt install passwd)"
  if [ "$use_systemd" = yes ]; then
    command -v systemctl >/dev/null && [ -d /run/systemd/system ] ||
      die $EXIT_HOST 'systemd does not run here; use --no-service and start the service in another way'
  fi
}

lock() {
  # Programs that this script starts inherit the lock: after a kill -9 of the script alone, the next run waits for them.
  mkdir -p "$root/run"
  exec 9>"$root/run/echoquad-install.lock"
  flock -w 60 9 || die $EXIT_HOST 'another installation of EchoQuad is running; wait until it has ended'
}

# Set python, python_version and python_platform: an interpreter of the version that the wheels are for.
find_python() {
  local candidate
  local facts='import sys, sysconfig; print("%d.%d" % sys.version_info[:2], sysconfig.get_platform())'
  local candidates=("/usr/bin/python$stick_python" "python$stick_python" python3)
  [ -z "$python" ] || candidates=("$python")
  python_version=''
  for candidate in "${candidates[@]}"; do
    read -r python_version python_platform < <("$candidate" -I -c "$facts" 2>/dev/null) || continue
    [ "$python_version" = "$stick_python" ] || continue
    python=$(command -v "$candidate")
    break
  done
  [ "$python_version" = "$stick_python" ] ||
    die $EXIT_HOST "the stick is for Python $stick_python, and this box has ${python_version:-none}; pack a stick with --python ${python_version:-VERSION}, or name the interpreter with --python PROGRAM"
  [ "$python_platform" = "linux-$stick_target" ] ||
    die $EXIT_HOST "the stick is for $stick_target, and this box's Python is for ${python_platform#linux-}; pack a stick with --target ${python_platform#linux-}"
  "$python" -I -c 'import venv, ctypes, ssl, sqlite3' 2>/dev/null ||
    die $EXIT_HOST "$python lacks modules of the standard library; install the full Python (Debian: apt install python3 python3-venv)"
  pip_wheel=$(printf '%s\n' "$stick_names" | grep -Ex 'wheels/pip-[0-9][^/]*\.whl' | tail -n 1 || true)
  [ -n "$pip_wheel" ] || "$python" -I -c 'import ensurepip' 2>/dev/null ||
    die $EXIT_HOST "$python has no pip for a virtual environment; install it first (Debian: apt install python3-venv)"
}

check_space() {
  local folder=$opt need available
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  # The copy of the stick, what is in the wheels with its compiled form, and room for the rest.
  need=$("$python" -I - "$stick" <<'PYTHON'
import pathlib, sys, zipfile
stick = pathlib.Path(sys.argv[1])
size = sum(path.stat().st_size for path in stick.rglob("*") if path.is_file())
for wheel in (stick / "wheels").glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        size += sum(entry.file_size * (1.6 if entry.filename.endswith(".py") else 1) for entry in archive.infolist())
print(int(size * 1.1) // 2**20 + 64)
PYTHON
  )
  available=$(($(df -B1M --output=avail "$folder" | tail -n 1)))
  [ "$available" -ge "$need" ] ||
    die $EXIT_HOST "$folder has $available MiB free, and this needs $need MiB; remove what is not needed"
}

# --- the stick -----------------------------------------------------------------------------------------------------

# Print the SHA-256 of a public key given as PEM on stdin, in its form $1: DER or PEM.
fingerprint() {
  openssl pkey -pubin -pubout -outform "$1" 2>/dev/null | sha256sum | cut -c 1-64
}

key_mismatch() {
  die $EXIT_VERIFICATION "the stick holds the key with SHA-256 $1, which is not the expected one; find out whose stick this is, and do not install it"
}

# Check signature, sums and names of the stick. Sets sums and stick_names, which later steps use instead of the files.
check_stick() {
  local stick_key='' trusted der pem listed found odd bad
  [ -f "$stick/SHA256SUMS" ] || die $EXIT_VERIFICATION "$stick has no SHA256SUMS; copy the whole stick again"
  sums=$(tr '\0' '?' <"$stick/SHA256SUMS")
  if [ -f "$stick/SHA256SUMS.sig" ]; then
    [ "$anchor" != none ] || die $EXIT_USAGE 'the stick is signed, and --unsigned would ignore it; use --key PUB.pem'
    [ -f "$stick/keys/bundle.pub" ] || die $EXIT_VERIFICATION 'keys/bundle.pub is missing; copy the whole stick again'
    stick_key=$(tr '\0' '?' <"$stick/keys/bundle.pub")
    der=$(fingerprint DER <<<"$stick_key") && pem=$(fingerprint PEM <<<"$stick_key") ||
      die $EXIT_VERIFICATION 'keys/bundle.pub is no public key; copy the whole stick again'
    if [ -z "$anchor" ] && [ -f "$etc/bundle.pub" ]; then
      anchor=key key=$etc/bundle.pub
    fi
    case $anchor in
      '') die $EXIT_VERIFICATION 'the stick is signed, and the key to expect is not known; give --key PUB.pem or --key-sha256 HEX, or --trust-stick to accept the key on the stick' ;;
      key)
        [ -f "$key" ] && trusted=$(tr '\0' '?' <"$key") && trusted=$(fingerprint DER <<<"$trusted") ||
          die $EXIT_USAGE "$key is no public key in PEM form"
        [ "$trusted" = "$der" ] || key_mismatch "$der" ;;
      key_sha256)
        trusted=$(tr -d ':' <<<"${key_sha256,,}")
        [ "$trusted" = "$der" ] || [ "$trusted" = "$pem" ] || key_mismatch "$der" ;;
      stick) say "The stick holds the key with SHA-256 $der (DER), $pem (PEM). Compare it with your own." ;;
    esac
    openssl dgst -sha256 -verify <(printf '%s\n' "$stick_key") -signature "$stick/SHA256SUMS.sig" \
      <(printf '%s\n' "$sums") >/dev/null 2>&1 ||
      die $EXIT_VERIFICATION 'SHA256SUMS.sig is not the signature of SHA256SUMS: the stick was damaged or changed; copy the whole stick again'
  else
    [ "$anchor" = none ] || die $EXIT_VERIFICATION 'the stick has no signature (SHA256SUMS.sig); use a signed one, or accept it with --unsigned'
  fi
  ! grep -Evq '^[0-9a-f]{64}  [^/].*$' <<<"$sums" && ! grep -Eq '(^.{66}|/)\.\.?(/|$)|[[:cntrl:]]' <<<"$sums" ||
    die $EXIT_VERIFICATION 'SHA256SUMS has a line of another form than "SUM  NAME"; copy the whole stick again'
  stick_names=$(cut -c 67- <<<"$sums" | sort)
  listed=$(sort -u <<<"$stick_names")
  [ "$listed" = "$stick_names" ] || die $EXIT_VERIFICATION 'SHA256SUMS names a file twice; copy the whole stick again'
  found=$(cd "$stick" && find . -mindepth 1 ! -type d -printf '%P\n' | sed -E '/^SHA256SUMS(\.sig)?$/d' | sort)
  odd=$(cd "$stick" && find . -mindepth 1 ! -type d ! -type f -printf '%P\n' -quit)
  [ -z "$odd" ] || die $EXIT_VERIFICATION "$odd is no regular file; copy the whole stick again"
  bad=$(comm -13 <(printf '%s\n' "$listed") <(printf '%s\n' "$found") | sed -n 1p)
  [ -z "$bad" ] || die $EXIT_VERIFICATION "$bad does not belong to the stick: SHA256SUMS does not name it; copy the whole stick again into a folder of its own"
  bad=$(comm -23 <(printf '%s\n' "$listed") <(printf '%s\n' "$found") | sed -n 1p)
  [ -z "$bad" ] || die $EXIT_VERIFICATION "$bad is missing on the stick; copy the whole stick again"
  check_sums "$stick"
  for bad in stick.json requirements.lock config/service.toml systemd/echoquad.service bundle/bundle.json; do
    grep -Fqx "$bad" <<<"$listed" || die $EXIT_VERIFICATION "the stick has no $bad; pack it again"
  done
}

# Compare the files of a copy of the stick with the sums that were verified.
check_sums() { # FOLDER
  local bad
  bad=$(cd "$1" && sha256sum --check --strict --quiet - 2>/dev/null <<<"$sums" | sed -n 1p) ||
    die $EXIT_VERIFICATION "${bad%%: FAILED*} was damaged or changed: its SHA-256 is not the one in SHA256SUMS; copy the whole stick again"
}

# Set stick_version, stick_target and stick_python from stick.json.
read_stick_json() {
  local text facts
  stick_version='' stick_target='' stick_python=''
  text=$(tr -d '\n' <"$stick/stick.json")
  [[ $text =~ \"format\":\ *1[,\ }] ]] ||
    die $EXIT_HOST 'stick.json has another format than 1; use the install.sh of this stick'
  for facts in echoquad:stick_version target:stick_target python:stick_python; do
    [[ $text =~ \"${facts%%:*}\":\ *\"([0-9A-Za-z.+_-]{1,64})\" ]] ||
      die $EXIT_HOST "stick.json has no proper '${facts%%:*}'; pack the stick again"
    printf -v "${facts##*:}" '%s' "${BASH_REMATCH[1]}"
  done
}

# --- releases ------------------------------------------------------------------------------------------------------

is_intact() { # RELEASE FOLDER
  [ -f "$1/installed.sha256" ] && (cd "$1" && sha256sum --check --strict --status installed.sha256) 2>/dev/null &&
    "$1/venv/bin/python" -I -c '' 2>/dev/null
}

link_target() { # LINK; prints the name of the release, or nothing
  [ ! -L "$1" ] || basename -- "$(readlink -- "$1")"
}

# Point a link to a release. A rename replaces it, so that it names a release at every moment.
point() { # LINK RELEASE
  ln -sfn "releases/$2" "$opt/.link"
  mv -fT "$opt/.link" "$1"
}

sweep_unfinished() {
  local folder
  rm -rf "${opt:?}"/.[a-z]*
  for folder in "$releases"/*/; do
    [ ! -d "$folder" ] || [ -f "$folder/installed.sha256" ] || rm -rf "${folder:?}"
  done
}

sweep_unused() {
  local folder name current previous
  current=$(link_target "$opt/current") # one substitution a line: only the status of the last one counts
  previous=$(link_target "$opt/previous")
  [ -n "$current" ] || return 0
  for folder in "$releases"/*/; do
    name=$(basename "$folder")
    [ "$name" = "$current" ] || [ "$name" = "$previous" ] || rm -rf "${releases:?}/$name"
  done
}

# Set release to the folder name of this stick's release: one that is there and intact, or a new one.
choose_release() {
  local id number=1
  id=$stick_version-$(sha256sum <<<"$sums" | cut -c 1-12)
  release=$id
  while [ -e "$releases/$release" ]; do
    if is_intact "$releases/$release"; then return; fi
    say "$release is damaged: it is installed again beside the damaged one."
    number=$((number + 1))
    release=$id.$number
  done
}

# Run a program with an empty environment: no setting of the caller, such as an index of pip, has an effect.
clean_run() { # FOLDER PROGRAM ...; the folder is for temporary files
  mkdir -p "$1"
  env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME="$1" TMPDIR="$1" "${@:2}"
}

# Run a program as the user of the service, or as nobody below another root. A caller other than root stays who it is.
service_run() {
  local user=$SERVICE_USER folder=$opt/.check # not the folder in which root works
  [ -z "$root" ] || user=nobody
  set -- env ECHOQUAD_CACHE_DIR="$folder/cache" ECHOQUAD_CONFIG_DIR="$folder/config" "$@"
  mkdir -p "$folder"
  if [ "$(id -u)" = 0 ]; then
    chown "$user:" "$folder"
    clean_run "$folder" setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups --no-new-privs \
      --inh-caps=-all -- "$@"
  else
    clean_run "$folder" "$@"
  fi
}

build_release() {
  local folder=$releases/$release work=$opt/.work pip
  service_run "$python" -I -c '' 2>/dev/null ||
    die $EXIT_HOST "the unprivileged user of the service cannot run $python; install Python for the whole system (Debian: apt install python3), or name another with --python PROGRAM"
  mkdir -p "$folder"
  say "Copying the stick to $folder ..."
  (cd "$stick" && xargs -d '\n' cp --parents --no-preserve=all -t "$folder" -- <<<"$stick_names")
  chmod -R u=rwX,go=rX "$folder"
  printf '%s\n' "$sums" >"$folder/SHA256SUMS"
  [ ! -f "$stick/SHA256SUMS.sig" ] || cp --no-preserve=all -- "$stick/SHA256SUMS.sig" "$folder/"
  check_sums "$folder" # what is installed are the bytes that were verified, also if the stick has changed since
  say "Installing the packages ..."
  if [ -n "$pip_wheel" ]; then
    clean_run "$work" "$python" -I -m venv --without-pip "$folder/venv"
    pip=("$folder/$pip_wheel/pip")
  else
    clean_run "$work" "$python" -I -m venv "$folder/venv"
    pip=(-I -m pip)
  fi
  (cd "$folder" && clean_run "$work" "$folder/venv/bin/python" "${pip[@]}" --isolated --disable-pip-version-check --no-input \
    --no-cache-dir --quiet install --no-index --find-links "$folder/wheels" --only-binary :all: --require-hashes \
    --no-warn-script-location -r "$folder/requirements.lock") ||
    die $EXIT_HOST 'the packages could not be installed, see above; nothing was changed'
  rm -rf "$folder/wheels"
  check_release "$release"
  (cd "$folder" && find . -type f ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum -- >"$opt/.sums")
  sync -f "$folder"
  mv "$opt/.sums" "$folder/installed.sha256" # from here on the release counts as complete
}

# Let the release prove itself on this box, as the user of the service.
check_release() { # RELEASE
  local folder=$releases/$1 log=$opt/.log options=()
  [ ! -f "$folder/keys/bundle.pub" ] || options=(--public-key "$folder/keys/bundle.pub")
  say "Checking $1 on this box ..."
  service_run "$folder/venv/bin/echoquad" doctor >"$log" 2>&1 || {
    cat "$log" >&2
    die $EXIT_VERIFICATION "'echoquad doctor' of $1 failed, see above; nothing was changed"
  }
  service_run "$folder/venv/bin/echoquad" verify "$folder/bundle" "${options[@]}" >"$log" 2>&1 || {
    cat "$log" >&2
    die $EXIT_VERIFICATION "'echoquad verify' of $1 failed, see above; nothing was changed"
  }
  cat "$log"
  rm -rf "${opt:?}"/.[a-z]*
}

# --- configuration, user, service ----------------------------------------------------------------------------------

make_user() {
  [ -z "$root" ] && [ "$(id -u)" = 0 ] || return 0
  getent passwd "$SERVICE_USER" >/dev/null || useradd --system --user-group --home-dir "$state" --no-create-home \
    --shell /usr/sbin/nologin "$SERVICE_USER"
}

owned() { # OWNER MODE PATH; sets them where this script runs as root on its own system
  chmod "$2" "$3"
  [ -n "$root" ] || chown "$1" "$3"
}

write_configuration() { # RELEASE
  local new=$releases/$1/config/service.toml
  mkdir -p "$etc" "$state"
  owned "$SERVICE_USER:$SERVICE_USER" 700 "$state"
  rm -f "$etc/service.toml.part"
  if [ ! -e "$etc/service.toml" ]; then
    cp "$new" "$etc/service.toml.part"
    owned "root:$SERVICE_USER" 640 "$etc/service.toml.part" # it may hold passwords of cameras and archives
    mv "$etc/service.toml.part" "$etc/service.toml"
  elif cmp -s "$new" "$etc/service.toml"; then
    rm -f "$etc/service.toml.new"
  else
    cp "$new" "$etc/service.toml.part"
    owned "root:$SERVICE_USER" 640 "$etc/service.toml.part"
    mv "$etc/service.toml.part" "$etc/service.toml.new"
    say "Your $etc/service.toml stays; the new default is beside it as service.toml.new."
  fi
}

# Switch to a release. Each step leaves a version that works: the old one until `current` is renamed, the new one after.
switch_to() { # RELEASE PREVIOUS
  [ -z "$2" ] || point "$opt/previous" "$2"
  point "$opt/current" "$1"
  follow_current
}

# Make what lies outside of /opt/echoquad that of the current release. The key is a link, so that it changes with it.
follow_current() {
  mkdir -p "$(dirname "$unit")"
  cp "$opt/current/systemd/echoquad.service" "$unit.part"
  mv "$unit.part" "$unit"
  mkdir -p "$etc"
  if [ -f "$opt/current/keys/bundle.pub" ]; then
    ln -sfn "$opt/current/keys/bundle.pub" "$etc/.bundle.pub"
    mv -fT "$etc/.bundle.pub" "$etc/bundle.pub"
  else
    rm -f "$etc/bundle.pub"
  fi
  sync -f "$opt"
}

# Succeed if the running service is that of a release: Python's path on its command line is in the release's folder.
is_running() { # RELEASE
  local pid
  pid=$(systemctl show --property MainPID --value "$SERVICE")
  [ "${pid:-0}" != 0 ] && tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -Fq "$releases/$1/venv/bin/" &&
    [ "$(systemctl show --property NeedDaemonReload --value "$SERVICE")" = no ]
}

# Print the address of the page, from the configuration.
service_address() {
  "$opt/current/venv/bin/python" -I - "$etc/service.toml" 2>/dev/null <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    http = tomllib.load(file).get("http", {})
tls = http.get("tls")
host = http.get("host", "127.0.0.1")
host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
host = f"[{host}]" if ":" in host else host
print(f"{'https' if tls else 'http'}://{host}:{http.get('port', 8770)}/")
PYTHON
}

# Wait until the service answers that it is ready. Any answer in TLS counts as ready: systemd has waited before.
wait_ready() { # ADDRESS SECONDS
  "$opt/current/venv/bin/python" -I - "$1" "$2" <<'PYTHON'
import ssl, sys, time, urllib.error, urllib.request
address, end = sys.argv[1], time.monotonic() + float(sys.argv[2])
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the box asks itself, and nothing secret is sent
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
while time.monotonic() < end:
    try:
        opener.open(address + "api/v1/ready", timeout=5).close()
        sys.exit(0)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it answers, and wants a token or a certificate
            sys.exit(0)
    except ssl.SSLError:
        sys.exit(0)
    except OSError as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            sys.exit(0)
    time.sleep(0.3)
sys.exit(1)
PYTHON
}

start_service() { # RELEASE; fails if the service does not become ready
  local address
  systemctl daemon-reload || return 1
  systemctl enable --quiet "$SERVICE" || return 1
  address=$(service_address) || return 1
  if is_running "$1" && wait_ready "$address" 5; then return 0; fi
  systemctl reset-failed "$SERVICE" 2>/dev/null || true
  timeout "$START_TIMEOUT_S" systemctl restart "$SERVICE" || return 1
  wait_ready "$address" 60
}

# Switch and start; if the service does not become ready, return to what was before.
switch_and_start() { # RELEASE
  local old older
  old=$(link_target "$opt/current")
  older=$(link_target "$opt/previous")
  if [ "$1" = "$old" ]; then
    follow_current
  elif [ -n "$old" ] && ! is_intact "$releases/$old"; then
    switch_to "$1" "$older"
  else
    switch_to "$1" "$old"
  fi
  [ "$use_systemd" = yes ] || return 0
  say "Starting the service ..."
  if start_service "$1"; then return 0; fi
  systemctl --no-pager --lines=20 status "$SERVICE" >&2 || true
  if [ -z "$old" ] || [ "$1" = "$old" ]; then
    die $EXIT_HOST "the service did not become ready, see above and 'journalctl -u $SERVICE'; correct $etc/service.toml, then run this again"
  fi
  say "The service of $1 did not become ready: returning to $old ..."
  point "$opt/current" "$old"
  if [ -n "$older" ]; then point "$opt/previous" "$older"; else rm -f "$opt/previous"; fi
  follow_current
  sweep_unused
  start_service "$old" || die $EXIT_HOST "neither $1 nor $old became ready; see 'journalctl -u $SERVICE'"
  die $EXIT_HOST "$1 did not become ready, see above and 'journalctl -u $SERVICE'; $old runs again"
}

report() { # RELEASE
  local address
  address=$(service_address) || address="the address in $etc/service.toml"
  if [ "$use_systemd" = yes ]; then
    say "EchoQuad $1 runs. Open $address in a browser on this box. Research use only, not for diagnosis."
  else
    say "EchoQuad $1 is installed, and nothing was started. To start it: $opt/current/venv/bin/echoquad serve $opt/current/bundle --config $etc/service.toml"
  fi
  [ ! -L "$opt/previous" ] || say "To return to the version before: sh $opt/current/install.sh --rollback"
}

# --- actions -------------------------------------------------------------------------------------------------------

install_stick() {
  stick=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")
  case $stick/ in "$opt"/*) die $EXIT_USAGE 'this copy of install.sh belongs to the installed version; run the one on the stick' ;; esac
  say "Checking the stick ..."
  check_stick
  read_stick_json
  find_python
  check_space
  choose_release
  if [ "$dry_run" = yes ]; then
    say "The stick is intact. It would install $release; now installed: $(link_target "$opt/current" | grep . || echo nothing)."
    return
  fi
  make_user
  mkdir -p "$releases"
  sweep_unfinished
  if [ -d "$releases/$release" ]; then
    check_release "$release"
  else
    trap 'rm -rf "${releases:?}/$release" "${opt:?}"/.[a-z]*' EXIT
    build_release
    trap - EXIT
  fi
  write_configuration "$release"
  switch_and_start "$release"
  sweep_unused
  report "$release"
}

roll_back() {
  local now before
  now=$(link_target "$opt/current")
  before=$(link_target "$opt/previous")
  [ -n "$before" ] || die $EXIT_HOST 'there is no version before this one'
  is_intact "$releases/$before" || die $EXIT_VERIFICATION "the version before, $before, is damaged; install its stick again"
  if [ "$dry_run" = yes ]; then
    say "This would return from $now to $before."
    return
  fi
  sweep_unfinished
  check_release "$before"
  # `current` is renamed first. A kill between the two leaves both at the version before; to repeat is then harmless.
  point "$opt/current" "$before"
  follow_current
  point "$opt/previous" "$now"
  if [ "$use_systemd" = yes ]; then
    say "Starting the service ..."
    start_service "$before" || {
      point "$opt/current" "$now"
      follow_current
      point "$opt/previous" "$before"
      start_service "$now" || die $EXIT_HOST "neither $before nor $now became ready; see 'journalctl -u $SERVICE'"
      die $EXIT_HOST "$before did not become ready, see 'journalctl -u $SERVICE'; $now runs again"
    }
  fi
  report "$before"
}

remove() {
  if [ "$dry_run" = yes ]; then
    say "This would remove $opt and $unit$([ "$purge" = no ] || echo ", and also $etc, $state and the user $SERVICE_USER")."
    return
  fi
  if [ "$use_systemd" = yes ] && [ -e "$unit" ]; then
    systemctl disable --now --quiet "$SERVICE" || systemctl kill --signal=KILL "$SERVICE" || true
  fi
  rm -f "$unit" "$unit.part" "$etc/bundle.pub" "$etc/.bundle.pub"
  [ "$use_systemd" = no ] || systemctl daemon-reload
  rm -rf "${opt:?}"
  if [ "$purge" = yes ]; then
    rm -rf "${etc:?}" "${state:?}" "${root:-}/var/cache/echoquad"
    if [ -z "$root" ] && getent passwd "$SERVICE_USER" >/dev/null; then userdel "$SERVICE_USER"; fi
    say "EchoQuad is removed, with configuration, data and user."
  else
    say "EchoQuad is removed. Configuration ($etc) and data ($state) stay; --remove --purge removes them, too."
  fi
}

main() {
  parse_options "$@"
  check_host
  [ "$dry_run" = yes ] || lock
  case $action in
    install) install_stick ;;
    rollback) roll_back ;;
    remove) remove ;;
  esac
}

main "$@"
exit
