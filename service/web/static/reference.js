/** API reference: Swagger UI for the service's OpenAPI document. */

SwaggerUIBundle({
  url: "openapi.json",
  domNode: document.getElementById("reference"),
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  docExpansion: "list",
  // No request to an external validator
  validatorUrl: null,
});
