"""Machines that join a Ray cluster from outside, with nothing but one outgoing ssh connection.

The connection carries a layer-3 tunnel (`ssh -w`), so that the machine has an address that the head reaches, and Ray on both ends
needs no change. `head` prepares a separate sshd on the head and issues tokens; `machine` uses a token. A token is an ssh
certificate with its key. sshd itself enforces what it allows: one connection, until it expires, for the tunnel and the offer.
"""
