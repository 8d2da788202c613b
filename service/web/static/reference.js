/** The reference of the REST API, drawn by Swagger UI from the service's own description. */

SwaggerUIBundle({
  url: "/openapi.json",
  domNode: document.getElementById("reference"),
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  docExpansion: "list",
  // Nothing is sent to a validator of somebody else's.
  validatorUrl: null,
});
