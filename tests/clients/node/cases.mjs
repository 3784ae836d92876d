// What the Node scripts of this folder share: what they ask, and how they say what they got; as cases.py.
export const QUESTION = "What is the capital of France?";
export const WEATHER_QUESTION = "What is the weather in Paris?";
export const CITY_QUESTION = "Describe the city of Paris as JSON.";
export const KEY = "none";
export const MAX_TOKENS = 16;
export const MAX_FORM_TOKENS = 160;

export const [baseURL, model, ...chosen] = process.argv.slice(2);

/** Go through all cases, or those that the command line names, and print what came of them. */
export async function run(cases) {
  const outcomes = {};
  for (const [name, ask] of Object.entries(cases)) {
    if (chosen.length && !chosen.includes(name)) continue;
    try {
      outcomes[name] = { value: await ask() };
    } catch (error) {
      outcomes[name] = { error: `${error.stack}\n${JSON.stringify(error)}` };
    }
  }
  console.log(JSON.stringify(outcomes));
}

/** What a client made of an error; throws where there was none. */
export async function refused(ask) {
  let answer;
  try {
    answer = await ask();
  } catch (error) {
    return error;
  }
  throw new Error(`no error, but ${JSON.stringify(answer)}`);
}
