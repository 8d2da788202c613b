#!/usr/bin/env bash
# One-time set-up of a subscription for azure/spot.yaml: the resource group, the identities of head and workers with their roles, and the
# head's persistent disk. What exists already is kept, so that the script can run again.
#   azure/account.sh SUBSCRIPTION STORAGE_ACCOUNT CONTAINER      the container must exist, in another resource group
#   azure/account.sh --ssh-from ADDRESSES        restricts ssh to these addresses; run it after `ray up`, which opens ssh to all
set -euo pipefail
group=moedisco location=eastus

if [ "$1" = --ssh-from ]; then
    firewall=$(az network nsg list --resource-group $group --query "[?starts_with(name, 'ray-moedisco-')].name" --output tsv)
    exec az network nsg rule update --resource-group $group --nsg-name "$firewall" --name SSH --source-address-prefixes "$2"
fi

# define ROLE SCOPE <DEFINITION
define() {
    local known
    known=$(az role definition list --name "$1" --scope "$2" --query "[].name" --output tsv)
    [ -n "$known" ] || az role definition create --role-definition @-
}
# grant ROLE IDENTITY SCOPE
grant() {
    az role assignment create --role "$1" --assignee-object-id "$2" --assignee-principal-type ServicePrincipal --scope "$3"
}

az account set --subscription "$1"
group_id=$(az group create --name $group --location $location --query id --output tsv)
head=$(az identity create --name moedisco --resource-group $group --query principalId --output tsv)
worker=$(az identity create --name moedisco-worker --resource-group $group --query principalId --output tsv)
account=$(az storage account show --name "$2" --query id --output tsv)
# Azure's own roles that may write blobs may also delete their container. Ray's launcher makes the head's identity a contributor to this
# group only.
blobs=Microsoft.Storage/storageAccounts/blobServices/containers
define "MoE-DisCo node" "${account%/providers/*}" <<ROLE
{"Name": "MoE-DisCo node", "Description": "Read, write, list and delete blobs", "AssignableScopes": ["${account%/providers/*}"],
 "Actions": ["$blobs/read"],
 "DataActions": ["$blobs/blobs/read", "$blobs/blobs/write", "$blobs/blobs/add/action", "$blobs/blobs/delete"]}
ROLE
for identity in "$head" "$worker"; do grant "MoE-DisCo node" "$identity" "$account/blobServices/default/containers/$3"; done
# A worker whose head stays away ends its bill by itself: node/power_off.sh.
define "MoE-DisCo worker" "$group_id" <<ROLE
{"Name": "MoE-DisCo worker", "Description": "Deallocate machines", "AssignableScopes": ["$group_id"],
 "Actions": ["Microsoft.Compute/virtualMachines/deallocate/action"]}
ROLE
grant "MoE-DisCo worker" "$worker" "$group_id"
az disk create --name moedisco-state --resource-group $group --zone 1 --size-gb 32 --sku Premium_LRS
