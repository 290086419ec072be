/* For the support file: `cy.bot()`, and what it took is given back after each test. */
/* global Cypress, afterEach, cy */
const WAIT = 330_000; // ms: longer than a bot is waited for

Cypress.Commands.add('bot', (filter = {}) => cy.task('botfarm:acquire', filter, { timeout: WAIT, log: false }));

afterEach(function () {
  cy.task('botfarm:end', this.currentTest.state, { log: false });
});
