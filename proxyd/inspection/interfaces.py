"""The interfaces, in the language that varlink(1) and varlinkctl(1) print."""

PROXY = "net.socketproxyd.Proxy"
METRICS = "io.systemd.Metrics"

_SERVICE_TEXT = """\
# The interface that every Varlink service has.
interface org.varlink.service

# Describes the service.
method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

# Describes an interface.
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound(interface: string)
error MethodNotFound(method: string)
error MethodNotImplemented(method: string)
error InvalidParameter(parameter: string)
error PermissionDenied()
error ExpectedMore()
"""

# In here no type is `any`: varlinkctl 257 and the Python package varlink do not know it.
_PROXY_TEXT = """\
# What a running systemd-socket-proxyd is doing.
interface net.socketproxyd.Proxy

# What a listener or a target has: connections, or datagrams.
type Kind (stream, datagram)

# One direction of a connection or flow. bytes: delivered so far; inFlight: read, and not delivered
# yet; datagrams: delivered so far, null for a connection.
type Half (
  bytes: int,
  inFlight: int,
  state: (flowing, draining, shut, dead),
  datagrams: ?int
)

# A client. header: its PROXY header is not complete; held: it waits for its target; connecting;
# open; lingering: one side is closed, and the other has not taken all yet; flow: it has sent
# datagrams. id: the same from the accept, or the first datagram, to the end. client: "" if the
# address is not known; that of the sender until its header is complete. localAddress: our own,
# towards the target. thread: 0 is the main one, -1 that for connections which may block.
type Connection (
  id: int,
  state: (header, held, connecting, open, lingering, flow),
  listener: string,
  client: string,
  clientPID: ?int,
  target: string,
  targetAddress: ?string,
  localAddress: ?string,
  sinceUSec: int,
  ageUSec: int,
  idleUSec: int,
  heldUSec: ?int,
  connectUSec: ?int,
  up: Half,
  down: Half,
  thread: int
)

# connectionsMaxPerSource: null without such a limit.
type Limits (
  connectionsMax: int,
  connectionsMaxPerSource: ?int,
  threadsMax: int,
  callersMax: int
)

type Listener (
  name: string,
  address: string,
  kind: Kind,
  target: string,
  accepting: bool
)

# held, served and failed: clients; for datagrams, those in hand, the flows begun, and the datagrams
# dropped because the target was down. failed: given up. downSinceUSec: null while the target is up.
type Target (
  target: string,
  kind: Kind,
  up: bool,
  downSinceUSec: ?int,
  reason: ?string,
  held: int,
  served: int,
  failed: int
)

# All datagrams so far: delivered, and dropped by cause. droppedByKernel: in full receive queues.
type Datagrams (
  flowsBegun: int,
  toTargets: int,
  toClients: int,
  dropped: [string]int,
  droppedByKernel: int
)

# Lists the clients, those of one target or in one state if asked to. Takes 'more'. For root and the
# user of the service. Ends with Incomplete, after all others, if some could not be listed.
method List(target: ?string, state: ?string) -> (connection: Connection)

# Reports clients and flows that come and go from now on, each once: a client when it waits for its
# PROXY header or its target or, if it does not, when it is being connected; and when it has left.
# Takes 'more'. For root and the user of the service. A caller that does not read is dropped. how:
# of an end, as in the log; "failed" if the client was given up, "refused" if its header was bad or
# late, or its source had no place left.
method Watch() -> (event: (begin, end), connection: Connection, how: ?string)

# Resets a connection, or a client that waits, or ends a flow. For root and the user of the
# service.
method Terminate(id: int) -> ()

# For everybody.
method Status() -> (
  version: string,
  pid: int,
  startedUSec: int,
  status: string,
  open: int,
  held: int,
  flows: int,
  datagrams: ?Datagrams,
  threads: int,
  limits: Limits,
  listeners: []Listener,
  targets: []Target
)

# There is no client to list, or none with this id.
error NoSuchConnection()

# There was no memory to list some, or the thread for connections which may block is blocked.
error Incomplete(missing: int)
"""

_METRICS_TEXT = """\
# Metrics, as systemd-report(1) reads them.
interface io.systemd.Metrics

type MetricFamilyType (gauge, counter, string)

# Takes 'more'. For everybody.
method List() -> (
  name: string,
  object: ?string,
  fields: ?object,
  value: any
)

# Takes 'more'. For everybody.
method Describe() -> (
  name: string,
  description: string,
  type: MetricFamilyType
)

error NoSuchMetric()
"""

TEXTS = {
    "org.varlink.service": _SERVICE_TEXT,
    PROXY: _PROXY_TEXT,
    METRICS: _METRICS_TEXT,
}
"""All interfaces, by name."""
