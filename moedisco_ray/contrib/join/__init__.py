"""Let machines outside of a Ray cluster's network join the cluster through one outgoing ssh connection.

The connection carries a layer-3 tunnel (`ssh -w`). The head can reach the machine at an address in the tunnel, so Ray
needs no change on either end. `head` sets up a separate sshd on the head and issues tokens; `machine` uses a token to
join.

A token contains an ssh certificate and its private key. sshd itself enforces its limits: it opens one connection before
it expires, and this connection can only carry the tunnel and read the offer (the Ray cluster's address and versions).
"""
