"""A typed client of the service, for programs that wait (`Client`) and for those that do not (`AsyncClient`)."""

from service.client.address import URL_VARIABLE, Address, address_file, find_address, load_address, save_address
from service.client.asynchronous import AsyncClient
from service.client.errors import DownloadError, RequestRefused, ServiceAway, ServiceProblem
from service.client.patience import Patience
from service.client.sync import Client

__all__ = [
    "URL_VARIABLE", "Address", "AsyncClient", "Client", "DownloadError", "Patience", "RequestRefused", "ServiceAway",
    "ServiceProblem", "address_file", "find_address", "load_address", "save_address",
]
