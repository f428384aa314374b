# Install EchoQuad from this stick on Windows without a network: for the person who runs this, or with -AllUsers for all.
# Run in PowerShell: powershell -ExecutionPolicy Bypass -File install.ps1 -Key PUB.pem
#
# As install.sh: the signature and all sums are checked first; each version is a folder of its own, which proves itself
# before the launcher echoquad.cmd names it; run again it upgrades. There is no Windows service: it prints what to start.
[CmdletBinding(DefaultParameterSetName = 'Install')]
param(
    [Parameter(ParameterSetName = 'Install')] [string] $Key,          # the public key that must have signed the stick
    [Parameter(ParameterSetName = 'Install')] [string] $KeySha256,    # or the SHA-256 of that key
    [Parameter(ParameterSetName = 'Install')] [switch] $TrustStick,   # or: accept the key on the stick
    [Parameter(ParameterSetName = 'Install')] [switch] $Unsigned,     # accept a stick without a signature
    [Parameter(ParameterSetName = 'Install')] [string] $Python = 'py',
    [Parameter(ParameterSetName = 'Rollback', Mandatory = $true)] [switch] $Rollback,
    [Parameter(ParameterSetName = 'Remove', Mandatory = $true)] [switch] $Remove,
    [Parameter(ParameterSetName = 'Remove')] [switch] $Purge,
    [switch] $AllUsers,
    [switch] $DryRun,
    [string] $Folder
)
Set-StrictMode -Version 3.0
$ErrorActionPreference = 'Stop'

$Utf8 = New-Object System.Text.UTF8Encoding $false

function Stop-Install([int] $Code, [string] $Message) {
    [Console]::Error.WriteLine("error: $Message")
    exit $Code
}

function Get-Sha256([byte[]] $Bytes) {
    $algorithm = [System.Security.Cryptography.SHA256]::Create()
    try { return [BitConverter]::ToString($algorithm.ComputeHash($Bytes)).Replace('-', '').ToLowerInvariant() }
    finally { $algorithm.Dispose() }
}

# Return the DER form of a public key in PEM form. Only P-256 keys are known: their form has 91 bytes.
function Read-PublicKey([string] $Path) {
    $text = [System.IO.File]::ReadAllText($Path)
    if ($text -notmatch '(?s)-----BEGIN PUBLIC KEY-----(.+?)-----END PUBLIC KEY-----') {
        Stop-Install 2 "$Path is no public key in PEM form"
    }
    $der = [Convert]::FromBase64String(($Matches[1] -replace '\s', ''))
    if ($der.Length -ne 91 -or $der[26] -ne 4) { Stop-Install 2 "$Path is no key on the curve P-256 (prime256v1)" }
    return , $der
}

# Return r and s of a DER signature, each of 32 bytes, as .NET wants them.
function ConvertFrom-DerSignature([byte[]] $Der) {
    $result = New-Object byte[] 64
    $at = 2
    foreach ($part in 0, 1) {
        if ($at + 2 -gt $Der.Length -or $Der[$at] -ne 2) { throw 'no DER signature' }
        $length = $Der[$at + 1]
        $start = $at + 2
        $at = $start + $length
        if ($at -gt $Der.Length) { throw 'no DER signature' }
        while ($length -gt 32 -and $Der[$start] -eq 0) { $start++; $length-- }
        if ($length -gt 32) { throw 'no DER signature' }
        [Array]::Copy($Der, $start, $result, 32 * $part + 32 - $length, $length)
    }
    return , $result
}

function Test-Signature([byte[]] $Data, [byte[]] $Signature, [byte[]] $KeyDer) {
    try {
        $header = [byte[]] (0x45, 0x43, 0x53, 0x31, 32, 0, 0, 0) # BCRYPT_ECDSA_PUBLIC_P256_MAGIC, length of a coordinate
        $blob = $header + $KeyDer[27..90]
        $cng = [System.Security.Cryptography.CngKey]::Import(
            $blob, [System.Security.Cryptography.CngKeyBlobFormat]::EccPublicBlob)
        $ecdsa = New-Object System.Security.Cryptography.ECDsaCng $cng
        $hash = [System.Security.Cryptography.SHA256]::Create().ComputeHash($Data)
        return $ecdsa.VerifyHash($hash, (ConvertFrom-DerSignature $Signature))
    }
    catch { return $false }
}

# Compare the files of a folder with the sums; $Sums is a dictionary of names and sums.
function Test-Sums([string] $Where, $Sums) {
    foreach ($name in $Sums.Keys) {
        $path = Join-Path $Where $name
        if (-not (Test-Path -LiteralPath $path -PathType Leaf)) { Stop-Install 3 "$name is missing; copy the whole stick again" }
        $found = (Get-FileHash -LiteralPath $path -Algorithm SHA256).Hash.ToLowerInvariant()
        if ($found -ne $Sums[$name]) {
            Stop-Install 3 "$name was damaged or changed: its SHA-256 is not the one in SHA256SUMS; copy the whole stick again"
        }
    }
}

# Check signature, names and sums of the stick; return names and sums, and the name of the release.
function Test-Stick([string] $Stick, [string] $InstalledKey) {
    $sumsPath = Join-Path $Stick 'SHA256SUMS'
    if (-not (Test-Path -LiteralPath $sumsPath)) { Stop-Install 3 'the stick has no SHA256SUMS; copy the whole stick again' }
    $data = [System.IO.File]::ReadAllBytes($sumsPath)
    $signaturePath = "$sumsPath.sig"
    if (Test-Path -LiteralPath $signaturePath) {
        if ($Unsigned) { Stop-Install 2 'the stick is signed, and -Unsigned would ignore it; use -Key PUB.pem' }
        $der = Read-PublicKey (Join-Path $Stick 'keys\bundle.pub')
        $fingerprint = Get-Sha256 $der
        if ($Key) { $expected = Get-Sha256 (Read-PublicKey $Key) }
        elseif ($KeySha256) { $expected = $KeySha256.Replace(':', '').ToLowerInvariant() }
        elseif ($TrustStick) {
            Write-Output "The stick holds the key with SHA-256 $fingerprint. Compare it with your own." | Out-Host
            $expected = $fingerprint
        }
        elseif (Test-Path -LiteralPath $InstalledKey) { $expected = Get-Sha256 (Read-PublicKey $InstalledKey) }
        else { Stop-Install 3 'the stick is signed, and the key to expect is not known; give -Key PUB.pem, -KeySha256 HEX or -TrustStick' }
        if ($expected -ne $fingerprint) {
            Stop-Install 3 "the stick holds the key with SHA-256 $fingerprint, which is not the expected one; find out whose stick this is"
        }
        if (-not (Test-Signature $data ([System.IO.File]::ReadAllBytes($signaturePath)) $der)) {
            Stop-Install 3 'SHA256SUMS.sig is not the signature of SHA256SUMS: the stick was damaged or changed; copy the whole stick again'
        }
    }
    elseif (-not $Unsigned) { Stop-Install 3 'the stick has no signature; use a signed one, or accept it with -Unsigned' }

    $sums = New-Object 'System.Collections.Generic.Dictionary[string,string]'
    foreach ($line in ($Utf8.GetString($data) -split "`n")) {
        if ($line -eq '') { continue }
        if ($line -cnotmatch '^([0-9a-f]{64})  ([^/\\:\x00-\x1f][^\\:\x00-\x1f]*)$' -or $Matches[2] -match '(^|/)\.\.?(/|$)') {
            Stop-Install 3 'SHA256SUMS has a line of another form than "SUM  NAME"; copy the whole stick again'
        }
        $sums[$Matches[2]] = $Matches[1]
    }
    $root = (Get-Item -LiteralPath $Stick).FullName.TrimEnd('\')
    foreach ($file in Get-ChildItem -LiteralPath $Stick -Recurse -Force -File) {
        $name = $file.FullName.Substring($root.Length + 1).Replace('\', '/')
        if ($name -ne 'SHA256SUMS' -and $name -ne 'SHA256SUMS.sig' -and -not $sums.ContainsKey($name)) {
            Stop-Install 3 "$name does not belong to the stick: SHA256SUMS does not name it; copy the whole stick again into a folder of its own"
        }
    }
    Test-Sums $Stick $sums
    return @{ Sums = $sums; Id = (Get-Sha256 $data).Substring(0, 12) }
}

# Replace a small text file in one step.
function Set-Text([string] $Path, [string] $Text) {
    [System.IO.File]::WriteAllText("$Path.part", $Text, $Utf8)
    if (Test-Path -LiteralPath $Path) { [System.IO.File]::Replace("$Path.part", $Path, [NullString]::Value) }
    else { [System.IO.File]::Move("$Path.part", $Path) }
}

function Get-Text([string] $Path) {
    if (Test-Path -LiteralPath $Path) { return [System.IO.File]::ReadAllText($Path).Trim() }
    return ''
}

# Run a program; stop if it fails. Settings of pip and Python have no effect on it.
function Invoke-Checked([int] $Code, [string] $What, [string] $Program, [string[]] $Arguments) {
    & $Program @Arguments | Out-Host
    if ($LASTEXITCODE -ne 0) { Stop-Install $Code "$What failed, see above; nothing was changed" }
}

function Test-Release([string] $Release) {
    $echoquad = Join-Path $Release 'venv\Scripts\echoquad.exe'
    $verify = @('verify', (Join-Path $Release 'bundle'))
    $public = Join-Path $Release 'keys\bundle.pub'
    if (Test-Path -LiteralPath $public) { $verify += @('--public-key', $public) }
    Invoke-Checked 3 "'echoquad doctor'" $echoquad @('doctor')
    Invoke-Checked 3 "'echoquad verify'" $echoquad $verify
}

# Make a release the current one: the launcher names it. The one before stays for -Rollback.
function Switch-Release([string] $Name, [string] $Before) {
    $program = Join-Path $Releases "$Name\venv\Scripts\echoquad.exe"
    $public = Join-Path $Releases "$Name\keys\bundle.pub"
    if (Test-Path -LiteralPath $public) { Set-Text (Join-Path $Folder 'bundle.pub') ([System.IO.File]::ReadAllText($public)) }
    if ($Before) { Set-Text (Join-Path $Folder 'previous.txt') $Before }
    Set-Text (Join-Path $Folder 'current.txt') $Name
    Set-Text (Join-Path $Folder 'echoquad.cmd') "@`"$program`" %*`r`n"
    $bundle = Join-Path $Releases "$Name\bundle"
    Set-Text (Join-Path $Folder 'serve.cmd') "@`"$program`" serve `"$bundle`" --config `"$(Join-Path $Folder 'service.toml')`"`r`n"
}

function Write-Report([string] $Name) {
    Write-Output "EchoQuad $Name is installed. To start the service: `"$(Join-Path $Folder 'serve.cmd')`""
    Write-Output 'Then open http://127.0.0.1:8770/ in a browser on this machine. Research use only, not for diagnosis.'
}

function Install-Stick {
    $stick = $PSScriptRoot
    Write-Output 'Checking the stick ...'
    $checked = Test-Stick $stick (Join-Path $Folder 'bundle.pub')
    $facts = [System.IO.File]::ReadAllText((Join-Path $stick 'stick.json')) | ConvertFrom-Json
    if ($facts.format -ne 1) { Stop-Install 1 'stick.json has another format than 1; use the install.ps1 of this stick' }
    if ("$($facts.echoquad)" -cnotmatch '^[0-9A-Za-z.+_-]{1,64}$' -or "$($facts.python)" -notmatch '^\d+\.\d+$') {
        Stop-Install 1 'stick.json has no proper version; pack the stick again'
    }
    if ($checked.Sums.Keys -match '^wheels/.*(manylinux|musllinux|linux_)') {
        Stop-Install 1 'the stick holds packages for Linux; use a stick whose wheels are for Windows'
    }
    $command = @($Python)
    if ($Python -eq 'py') { $command += "-$($facts.python)" }
    $options = @($command | Select-Object -Skip 1)
    $version = & $command[0] @options -I -c 'import sys; print("%d.%d" % sys.version_info[:2])'
    if ($LASTEXITCODE -ne 0 -or $version -ne $facts.python) {
        Stop-Install 1 "the stick is for Python $($facts.python), which is not here; install it, or name it with -Python python.exe"
    }
    $name = "$($facts.echoquad)-$($checked.Id)"
    if ($DryRun) { Write-Output "The stick is intact. It would install $name in $Folder."; return }

    $release = Join-Path $Releases $name
    $done = Join-Path $release 'installed.txt'
    New-Item -ItemType Directory -Force -Path $Releases | Out-Null
    if (-not (Test-Path -LiteralPath $done)) {
        if (Test-Path -LiteralPath $release) { Remove-Item -LiteralPath $release -Recurse -Force } # of a run that was cut off
        Write-Output "Copying the stick to $release ..."
        New-Item -ItemType Directory -Path $release | Out-Null
        Copy-Item -Path (Join-Path $stick '*') -Destination $release -Recurse
        Test-Sums $release $checked.Sums
        Write-Output 'Installing the packages ...'
        Invoke-Checked 1 'python -m venv' $command[0] ($options + @('-I', '-m', 'venv', (Join-Path $release 'venv')))
        $pip = @('-I', '-m', 'pip', '--isolated', '--disable-pip-version-check', '--no-input', '--no-cache-dir', '--quiet',
            'install', '--no-index', '--find-links', (Join-Path $release 'wheels'), '--only-binary', ':all:',
            '--require-hashes', '-r', (Join-Path $release 'requirements.lock'))
        Invoke-Checked 1 'pip' (Join-Path $release 'venv\Scripts\python.exe') $pip
        Remove-Item -LiteralPath (Join-Path $release 'wheels') -Recurse -Force
        Test-Release $release
        Set-Text $done $name
    }
    else { Test-Release $release }

    $config = Join-Path $Folder 'service.toml'
    $default = Join-Path $release 'config\service.toml'
    if (-not (Test-Path -LiteralPath $config)) { # the configuration of the stick is for Linux: the store is another one
        $store = (Join-Path $Folder 'store').Replace('\', '/')
        Set-Text $config ([System.IO.File]::ReadAllText($default).Replace('/var/lib/echoquad/store', $store))
    }
    else { Copy-Item -LiteralPath $default -Destination "$config.new" -Force }
    $before = Get-Text (Join-Path $Folder 'current.txt')
    if ($before -eq $name) { $before = '' }
    Switch-Release $name $before
    $kept = @($name, (Get-Text (Join-Path $Folder 'previous.txt')))
    foreach ($other in Get-ChildItem -LiteralPath $Releases -Directory) {
        # A version whose service still runs cannot be removed; the next run tries again.
        if ($other.Name -notin $kept) { Remove-Item -LiteralPath $other.FullName -Recurse -Force -ErrorAction SilentlyContinue }
    }
    Write-Report $name
}

function Invoke-Rollback {
    $now = Get-Text (Join-Path $Folder 'current.txt')
    $before = Get-Text (Join-Path $Folder 'previous.txt')
    if (-not $before -or -not (Test-Path -LiteralPath (Join-Path $Releases "$before\installed.txt"))) {
        Stop-Install 1 'there is no version before this one'
    }
    if ($DryRun) { Write-Output "This would return from $now to $before."; return }
    Test-Release (Join-Path $Releases $before)
    Switch-Release $before $now
    Write-Report $before
}

function Remove-Installation {
    $paths = @($Releases) + @('current.txt', 'previous.txt', 'echoquad.cmd', 'serve.cmd', 'bundle.pub' | ForEach-Object { Join-Path $Folder $_ })
    if ($Purge) { $paths = @($Folder) }
    foreach ($path in $paths) {
        if (-not (Test-Path -LiteralPath $path)) { continue }
        if ($DryRun) { Write-Output "This would remove $path." }
        else { Remove-Item -LiteralPath $path -Recurse -Force }
    }
    if (-not $DryRun -and -not $Purge) { Write-Output "EchoQuad is removed. Configuration and data in $Folder stay; -Remove -Purge removes them, too." }
}

if (-not $Folder) {
    $base = if ($AllUsers) { $env:ProgramFiles } else { $env:LOCALAPPDATA }
    $Folder = Join-Path $base 'EchoQuad'
}
$Releases = Join-Path $Folder 'releases'
foreach ($name in @(Get-ChildItem Env: | Where-Object { $_.Name -match '^(PIP|PYTHON)' } | ForEach-Object { $_.Name })) {
    Remove-Item -LiteralPath "Env:$name" # no setting of the caller, such as an index of pip, has an effect
}
if (@($Key, $KeySha256, $TrustStick.IsPresent, $Unsigned.IsPresent | Where-Object { $_ }).Count -gt 1) {
    Stop-Install 2 'only one of -Key, -KeySha256, -TrustStick and -Unsigned can be given'
}
switch ($PSCmdlet.ParameterSetName) {
    'Rollback' { Invoke-Rollback }
    'Remove' { Remove-Installation }
    default { Install-Stick }
}
