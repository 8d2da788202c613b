#!/usr/bin/env bash
# One-time set-up of a subscription for azure/spot.yaml: the resource group, the nodes' identity and role, and the head's persistent disk.
# What exists already is kept, so that the script can run again.
#   azure/account.sh SUBSCRIPTION STORAGE_ACCOUNT CONTAINER      the container must exist, in another resource group
#   azure/account.sh --ssh-from ADDRESSES        restricts ssh to these addresses; run it after `ray up`, which opens ssh to all
set -euo pipefail
group=moedisco location=eastus

if [ "$1" = --ssh-from ]; then
    firewall=$(az network nsg list --resource-group $group --query "[?starts_with(name, 'ray-moedisco-')].name" --output tsv)
    exec az network nsg rule update --resource-group $group --nsg-name "$firewall" --name SSH --source-address-prefixes "$2"
fi

az account set --subscription "$1"
az group create --name $group --location $location
identity=$(az identity create --name moedisco --resource-group $group --query principalId --output tsv)
account=$(az storage account show --name "$2" --query id --output tsv)
# Azure's own roles that may write blobs may also delete their container. Ray's launcher makes the identity a contributor to this
# group only.
blobs=Microsoft.Storage/storageAccounts/blobServices/containers
known=$(az role definition list --name "MoE-DisCo node" --scope "${account%/providers/*}" --query "[].name" --output tsv)
[ -n "$known" ] || az role definition create --role-definition @- <<ROLE
{"Name": "MoE-DisCo node", "Description": "Read, write, list and delete blobs", "AssignableScopes": ["${account%/providers/*}"],
 "Actions": ["$blobs/read"],
 "DataActions": ["$blobs/blobs/read", "$blobs/blobs/write", "$blobs/blobs/add/action", "$blobs/blobs/delete"]}
ROLE
az role assignment create --role "MoE-DisCo node" --assignee-object-id "$identity" --assignee-principal-type ServicePrincipal \
    --scope "$account/blobServices/default/containers/$3"
az disk create --name moedisco-state --resource-group $group --zone 1 --size-gb 32 --sku Premium_LRS
